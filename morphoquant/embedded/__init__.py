"""The embedded room: everything a run needs when there is no network and no downloaded data.

- :mod:`~morphoquant.embedded.questions` and the four content modules draw synthetic questions;
- :mod:`~morphoquant.embedded.benchmarks` writes them as data sets that lmms-eval's stock task
  code reads;
- ``weights/`` holds a small Qwen2.5-Omni thinker that was trained on the same kinds of question.
"""

"""One HTML file that a reviewer opens to check every claim of some runs.

``gather`` reads folders, ``groups`` sorts runs by what they may be compared on, ``compare``,
``pictures``, ``questions`` and ``provenance`` make the parts, ``render`` puts them into
``templates/``. Notable choices:

- The same run directories give the same bytes: nothing is read but what lies in them, no clock
  and no absolute path.
- Runs are compared only where they answered the same questions of the same model; every such
  group has its own tables.
- The file loads nothing from anywhere and says so itself in a content security policy, which also
  keeps an answer that looks like HTML from ever becoming a script. Text from data is escaped.
- A run's own figures are recomputed from its tables while the report is written, and the report
  shows what held.
"""

from morphoquant.analysis.page.gather import Gathered, gather
from morphoquant.analysis.page.render import render

__all__ = ["Gathered", "gather", "render"]

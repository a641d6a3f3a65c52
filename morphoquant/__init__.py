"""An experiment harness for quantizing omni-modal language models.

The package is imported lazily: nothing here pulls in torch, transformers or lmms-eval.
"""

__version__ = "0.1.0"

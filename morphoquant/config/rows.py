"""The rows of published tables, as they can be measured here."""

from __future__ import annotations

TABLE1 = (
    ("w16a16", "fp16"),
    ("w4a16", "nf4"),
    ("w4a16", "smoothquant"),
    ("w4a16", "awq"),
    ("w4a16", "mbq"),
    ("w8a8", "mbq"),
    ("w8a8", "mquant"),
    ("w8a8", "morphoquant"),
    ("w8a8", "morphoquant_hif8"),
    ("w4a4", "rtn_static"),
    ("w4a4", "mbq"),
    ("w4a4", "mquant"),
    ("w4a4", "quarot"),
    ("w4a4", "morphoquant"),
    ("w4a4", "morphoquant_hif4"),
)
"""Scheme and method of every row of Table 1, in its order; ``conf/row/<scheme>_<method>.yaml``."""

"""Quantisation schemes. One file and one registration each."""

from __future__ import annotations

from ..registry import Registry
from .base import Scheme, SchemeOutput
from .int8 import Int8

__all__ = ["SCHEMES", "Scheme", "SchemeOutput"]

SCHEMES: Registry[Scheme] = Registry("scheme")
SCHEMES.add("int8", Int8())

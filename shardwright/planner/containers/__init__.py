"""Containers: how bytes lie in files. One file and one registration each."""

from __future__ import annotations

from ..registry import Registry
from .base import Container
from .safetensors import Safetensors
from .torch_zip import TorchZip
from .zarr import Zarr

__all__ = ["CONTAINERS"]

CONTAINERS: Registry[Container] = Registry("container")
CONTAINERS.add("safetensors", Safetensors())
CONTAINERS.add("torch", TorchZip())
CONTAINERS.add("zarr", Zarr())

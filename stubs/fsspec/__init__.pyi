"""The part of fsspec that ptacc and its tests use. fsspec has no types; stubtest compares these stubs with it."""

from fsspec.registry import register_implementation as register_implementation
from fsspec.spec import AbstractFileSystem as AbstractFileSystem

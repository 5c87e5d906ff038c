"""The part of fsspec that ptacc and its tests use. It ships no types of its own; stubtest holds these against it."""

from fsspec.registry import register_implementation as register_implementation
from fsspec.spec import AbstractFileSystem as AbstractFileSystem

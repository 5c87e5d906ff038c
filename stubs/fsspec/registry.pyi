from collections.abc import Mapping
from typing import Any

from fsspec.spec import AbstractFileSystem

known_implementations: dict[str, dict[str, Any]]
registry: Mapping[str, type[AbstractFileSystem]]

def get_filesystem_class(protocol: str) -> type[AbstractFileSystem]: ...
def register_implementation(
    name: str, cls: type[AbstractFileSystem] | str, clobber: bool = False, errtxt: str | None = None
) -> None: ...

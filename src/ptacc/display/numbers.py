"""Numbers as text."""

from __future__ import annotations


def format_bytes(size: float) -> str:
    """Return a number of bytes in binary units, as torch reports memory: 1 KiB is 1,024 bytes.

    Example:
        >>> format_bytes(1023), format_bytes(1536), format_bytes(497_759_232), format_bytes(3 * 2**30)
        ('1023 B', '1.5 KiB', '474.7 MiB', '3.00 GiB')
    """
    for unit, digits in (("B", 0), ("KiB", 1), ("MiB", 1), ("GiB", 2)):
        if size < 1024:
            return f"{size:.{digits}f} {unit}"
        size /= 1024
    return f"{size:.2f} TiB"


def format_value(value: float) -> str:
    """Return a value with five significant digits, and a large one in full.

    Example:
        >>> format_value(0.123456), format_value(1234567.8), format_value(1e-7), format_value(float("nan"))
        ('0.12346', '1,234,568', '1e-07', 'nan')
    """
    return f"{value:,.0f}" if 1e5 <= abs(value) < 1e12 else f"{value:.5g}"

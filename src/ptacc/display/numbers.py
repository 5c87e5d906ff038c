"""Numbers as text."""

from __future__ import annotations


def format_bytes(size: float) -> str:
    """Return a number of bytes in decimal units: 1 kB is 1,000 bytes.

    Example:
        >>> format_bytes(999), format_bytes(1500), format_bytes(497_759_232)
        ('999 B', '1.5 kB', '497.8 MB')
    """
    if size < 1000:
        return f"{size:.0f} B"
    for unit in ("kB", "MB", "GB"):
        size /= 1000
        if size < 999.95:  # larger ones are rounded to 1000.0
            return f"{size:.1f} {unit}"
    return f"{size / 1000:.1f} TB"


def format_value(value: float) -> str:
    """Return a value with up to five significant digits, in full if it is an integer.

    Example:
        >>> format_value(0.123456), format_value(1_234_567), format_value(1e-7), format_value(float("nan"))
        ('0.12346', '1234567', '1e-07', 'nan')
    """
    return f"{value:.0f}" if abs(value) < 1e15 and value == int(value) else f"{value:.5g}"

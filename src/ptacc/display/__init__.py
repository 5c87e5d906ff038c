"""Numbers and tables as text and as HTML."""

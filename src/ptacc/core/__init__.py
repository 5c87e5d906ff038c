"""What a mixin or a callback is written against."""

"""What the files of a run say about it: a page of charts and tables, and a listing of runs."""

"""Whether the promise is kept, and what keeping it costs: the tables of `make bench-routing`."""

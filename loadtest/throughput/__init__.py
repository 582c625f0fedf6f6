"""How many requests a second a gateway on one core answers: `make bench-gateway`."""

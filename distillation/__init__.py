"""From log to release: dataset, training, cross-fitting, gate, economics."""

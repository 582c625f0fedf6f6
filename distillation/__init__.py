"""From log to release: dataset, training, evaluation, gate, economics."""

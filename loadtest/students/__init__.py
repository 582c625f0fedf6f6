"""Every kind of student on the same traffic, side by side: `make bench-students`."""

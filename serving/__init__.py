"""The models and the records they share. Imports nothing of ours."""

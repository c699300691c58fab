"""Looks at runs in a terminal. Imports neither torch nor Lightning."""

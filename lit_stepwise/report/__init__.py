"""One HTML file about a run: its curves, and its trajectories turn by turn. It needs no network and no other file.

Importing this room loads neither torch nor DuckDB.
"""

"""What was played and learnt, in Parquet files: ``write`` is for a run, ``read`` for whoever looks at it.

Importing this room loads neither torch nor DuckDB nor pyarrow.
"""

from lit_stepwise.store.settings import Storage

__all__ = ["Storage"]

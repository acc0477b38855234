"""The results of a run: metrics.json, tables, and the report that opens in a browser."""

"""What a run reached: metrics.json, tables, and the report that opens in a browser."""

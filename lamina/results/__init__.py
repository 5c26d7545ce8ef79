"""Numbers and pages: metrics, records, tables and reports."""

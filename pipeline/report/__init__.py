"""The outcome in words, tables and pages."""

"""What a person reads: numbers with prefixes, tables, CSV and Markdown."""

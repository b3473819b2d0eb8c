"""Results -> a page, a Markdown file, a CSV and figures."""

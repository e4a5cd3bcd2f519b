"""The results of a compilation as JSON, HTML, Markdown and one line."""

"""What `python -m fastssl.report` puts on its page, and how."""

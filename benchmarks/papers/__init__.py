"""Settings of papers run again, their closed forms or printed figures beside ours."""

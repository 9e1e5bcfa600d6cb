"""Reports from what runs wrote: one picture of several runs, a page of one run, or the history of one prompt."""

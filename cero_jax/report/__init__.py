"""Reading what a run wrote: curves, one picture, one page, the history of a prompt."""

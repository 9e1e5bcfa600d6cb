"""Reports from what runs wrote: a picture and figures of several runs, a page of one, or one prompt's history."""

"""HTML pages and terminal texts: the report of a run, and the plan of one. No network, library or server needed."""

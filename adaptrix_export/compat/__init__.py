"""Private, patched and renamed names of other libraries, each with the versions it was seen in."""

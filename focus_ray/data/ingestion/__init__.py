"""From files of a source to versions of categories: looked at, checked, written in pieces, settled, changed later."""

"""From folders of photographs to a version of a data set."""

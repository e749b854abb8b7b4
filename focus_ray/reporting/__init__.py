"""Pages that help a person decide: of an evaluation, of a training; and the shell of every page. No Ray."""

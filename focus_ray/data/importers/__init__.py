"""From folders of other people's shapes to a plan of samples: one file a shape, and the list of them."""

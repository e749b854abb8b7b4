"""The inspection service: answers HTTP requests with the models of a registry, on Ray Serve. See docs/use/serving.md."""

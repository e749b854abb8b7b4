"""AUROC, AUPRO and other metrics of labelled images."""

"""Calibration sets, FP16 and INT8 variants, and the choice between them."""

# The folder lies at the top of the checkout, so a bare ``import calibration`` would find it too
# and every class would exist twice.
if __name__ != "edgeglm.calibration":
    raise ImportError(f"imported as {__name__!r}; import edgeglm.calibration")

"""The bundle: everything a device needs, hashed, in one folder or one file.

    manifest.json                        schema version, digests, provenance of every stage
    models/<variant>/<tower>.onnx        the candidates that passed their gate
    engines/<name>.plan, <name>.json     built engines, metadata beside the plan and never inside it
    tokenizer/tokenizer.json, preprocessing.json, calibration.json
    golden/inputs/*, golden/outputs.npz  raw inputs and what the reference variant made of them
    gallery/                             embeddings of each variant, rows and thumbnails
    recipe.toml, target.toml             as resolved
    licences.json, NOTICE.md, report.html, metrics.json

This list and the content digest in ``manifest`` are what other rooms may rely on.
"""

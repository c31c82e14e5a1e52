"""The bundle: everything a device needs, hashed, in one folder or one file.

    manifest.json                        schema version, digests, provenance of every stage
    models/<variant>/<tower>.onnx        the candidates that passed their gate
    reranker/                            the fused re-ranker, where the recipe has one
    costs/<variant>-<tower>.json         what each graph takes, so that a device plans without onnx
    engines/<name>.plan, <name>.json     built engines, metadata beside the plan and never inside it
    tokenizer/tokenizer.json, preprocessing.json, calibration.json, precision_plan.json
    golden/inputs/*, golden/outputs.npz  raw inputs and what the reference variant made of them
    gallery/                             embeddings of each variant, rows and thumbnails
    recipe.toml, target.toml             as resolved
    compile.json, preflight.json         which engines were built or left to a device; which boards take it
    finalize.sh                          builds the engines with a shell alone, where a Jetson is a member
    licences.json, NOTICE.md, report.html, metrics.json

This list and the content digest in ``manifest`` are what other rooms may rely on.
"""

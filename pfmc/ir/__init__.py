"""The thin layer on onnx_ir: vocabulary, meanings, matching, provenance, checks, text."""

"""Messages and files to the model's inputs: `sample` and `chat`, `images` and `video`, `tiling`, `plan`, `execute` …

Families of transformers: `fit` (geometry), `families` and `family_chat` (prompts), `hf` (a checkpoint's own files).

Data flows one way: messages → `plan.plan` (views, frames, exact token counts; no model) → `execute.execute`.
"""

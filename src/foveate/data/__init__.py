"""Messages and files to the model's inputs: `sample` and `chat`, `images` and `video`, `tiling`, `plan`, `execute` …

Data flows one way: messages → `plan.plan` (views, frames, exact token counts; no model) → `execute.execute`.
"""

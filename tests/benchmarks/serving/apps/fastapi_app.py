"""FastAPI with a `def` endpoint: started by `uvicorn fastapi_app:app --workers CORES`.

- `def`, so that decoding and the model run in FastAPI's threads and not on its event loop
  (https://fastapi.tiangolo.com/async/#path-operation-functions).
- One worker process for each core, each with its own session on one thread
  (https://fastapi.tiangolo.com/deployment/server-workers/).
- The body is the file itself, which spares the parsing of a form.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Body, FastAPI

from tests.benchmarks.serving.apps.common import Model

app = FastAPI()
model = Model(threads=1)


@app.post("/predict", response_model=None)
def predict(image: Annotated[bytes, Body(media_type="image/jpeg")]) -> dict[str, Any]:
    """The five most probable classes of one JPEG."""
    return model.predict(image)

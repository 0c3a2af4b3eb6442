"""What all records are made of."""

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """A result as JSON. Unknown keys are kept: a newer deepen may have written them."""

    # NaN and infinities are written as strings, which read back: JSON has no other way to hold them.
    model_config = ConfigDict(frozen=True, extra="allow", ser_json_inf_nan="strings")

"""What the service can do, one file per endpoint. To add one: write the file, add its router here."""

from app.capabilities import anomaly_score, decode, denoise, encode, inpaint, interpolate, reconstruct, sample

ROUTERS = (
    encode.router,
    decode.router,
    reconstruct.router,
    denoise.router,
    inpaint.router,
    anomaly_score.router,
    sample.router,
    interpolate.router,
)

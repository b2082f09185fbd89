"""The scores of arrays, under the name that users import.

Knows nothing itself: `unet_ray.scores.metrics` computes and explains each score.
"""

from unet_ray.scores.metrics import (
    ClassScore as ClassScore,
)
from unet_ray.scores.metrics import (
    Score as Score,
)
from unet_ray.scores.metrics import (
    accuracy as accuracy,
)
from unet_ray.scores.metrics import (
    adapted_rand_error as adapted_rand_error,
)
from unet_ray.scores.metrics import (
    ap50 as ap50,
)
from unet_ray.scores.metrics import (
    ap_mean as ap_mean,
)
from unet_ray.scores.metrics import (
    class_scores as class_scores,
)
from unet_ray.scores.metrics import (
    dice as dice,
)
from unet_ray.scores.metrics import (
    instance_scores as instance_scores,
)
from unet_ray.scores.metrics import (
    iou as iou,
)
from unet_ray.scores.metrics import (
    isbi_scores as isbi_scores,
)
from unet_ray.scores.metrics import (
    overlap_tables as overlap_tables,
)
from unet_ray.scores.metrics import (
    pixel_error as pixel_error,
)
from unet_ray.scores.metrics import (
    rand_error as rand_error,
)
from unet_ray.scores.metrics import (
    rand_error_foreground as rand_error_foreground,
)
from unet_ray.scores.metrics import (
    seg as seg,
)
from unet_ray.scores.metrics import (
    v_info as v_info,
)
from unet_ray.scores.metrics import (
    v_rand as v_rand,
)
from unet_ray.scores.metrics import (
    voi_merge as voi_merge,
)
from unet_ray.scores.metrics import (
    voi_split as voi_split,
)
from unet_ray.scores.metrics import (
    warping_error as warping_error,
)

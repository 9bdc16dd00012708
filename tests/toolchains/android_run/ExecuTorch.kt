// What the Android sample uses of ExecuTorch's Java API, so that it compiles and runs on a desktop JVM. The module computes nothing: beside
// its file, it appends each input to `seen`, and answers with the next row of `answers`. Signatures are written from the published API
// (org.pytorch.executorch); they are not the library.
package org.pytorch.executorch

import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder

class Tensor private constructor(val dataAsFloatArray: FloatArray, private val sizes: LongArray) {
    fun shape() = sizes

    companion object {
        @JvmStatic
        fun fromBlob(data: FloatArray, shape: LongArray): Tensor {
            require(data.size.toLong() == shape.fold(1L) { a, b -> a * b }) { "data does not fill the shape" }
            return Tensor(data, shape)
        }
    }
}

class EValue private constructor(private val tensor: Tensor) {
    fun toTensor() = tensor

    companion object {
        @JvmStatic fun from(tensor: Tensor) = EValue(tensor)
    }
}

class Module private constructor(private val path: String) {
    private val answers = ByteBuffer.wrap(File(path).resolveSibling("answers").readBytes()).order(ByteOrder.LITTLE_ENDIAN)
    private val classes = answers.getInt()

    fun forward(vararg inputs: EValue): Array<EValue> {
        val values = inputs.single().toTensor().dataAsFloatArray
        val bytes = ByteBuffer.allocate(4 * values.size).order(ByteOrder.LITTLE_ENDIAN)
        values.forEach { bytes.putFloat(it) }
        File(path).resolveSibling("seen").appendBytes(bytes.array())
        val row = FloatArray(classes) { answers.getFloat() }
        return arrayOf(EValue.from(Tensor.fromBlob(row, longArrayOf(1, classes.toLong()))))
    }

    companion object {
        @JvmStatic
        fun load(path: String): Module {
            require(File(path).isFile)
            return Module(path)
        }
    }
}
